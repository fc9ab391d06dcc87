"""Pure tensor functions: no module, file, device policy or logging.

Axis letters: B batch, S sequence, I in, O out, R rows and C columns of a weight, K sketch, N examples, Q queries.
"""
