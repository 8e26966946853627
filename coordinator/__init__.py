"""The coordinator: forms cohorts, relays what members seal, unmasks only the sum. Never imports torch."""
