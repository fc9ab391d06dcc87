"""Unrolled influence: the exact derivative of behaviors with respect to the weight of each example's loss."""
