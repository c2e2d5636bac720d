"""Hypernetworks of A1111's kind: the networks, their files, their verbs."""
