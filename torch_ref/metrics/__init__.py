"""Instruments that training and evaluation measure with."""
