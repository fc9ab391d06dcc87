"""The ladder of methods that answer what a model would do without a stage, from seconds to exact."""
