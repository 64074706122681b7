"""Signing releases and publishing them."""
