"""The mixture of prompt experts: gate, logits, and the model that a client trains."""
