"""Mask sets: what each head of a frozen model may skip, and the file that holds it."""
