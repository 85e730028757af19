"""A recipe as its consumers want it: Transformer Engine's object, Megatron-Core's fields."""
