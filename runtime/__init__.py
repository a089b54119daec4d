"""Serves plans on engines; knows no compiler."""
