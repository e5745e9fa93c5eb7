"""Measurements. Rows that a claim rests on are committed under results/ with machine, versions and commit."""
