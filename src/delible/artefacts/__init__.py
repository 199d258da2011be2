"""Kinds of artefacts: what a run can make, one file each."""
