"""The coordinator: forms cohorts, relays what members seal for each other, unmasks only the sum. Never imports torch."""
