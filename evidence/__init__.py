"""Evidence: does one round of federated fine-tuning come close to many? ``python -m evidence.run`` measures it."""
