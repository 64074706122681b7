"""Model versions and their aliases."""
