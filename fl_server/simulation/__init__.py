"""`fl-server simulate`: the rounds of a real run with virtual devices, without any network."""
