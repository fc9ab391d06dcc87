"""Weights as they would be without an earlier stage, trained along with the stage that is being recorded."""
