"""What this repository's test runs do beyond pytest: typed imports, proof tiers, and the ledger of skips."""
