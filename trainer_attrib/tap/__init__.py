"""Live modules -> per-example gradient sketches. Used while recording and when sketching queries; knows no files."""
