"""Families that mmlens refuses, and why."""

REFUSED: dict[str, str] = {"blip": "x", "pix2struct": "x"}
