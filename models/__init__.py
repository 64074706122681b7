"""The contract that devices and coordinator share; it imports neither of them."""
