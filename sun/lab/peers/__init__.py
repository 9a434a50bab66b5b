"""Trainers of the methods SUN is measured against."""
