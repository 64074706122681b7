"""From a signed offer to the active slot: fetch, verify, stage, try, keep or roll back."""
