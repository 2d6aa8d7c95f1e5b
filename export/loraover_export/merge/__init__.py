"""The merge of an adapter into the weights of its base model, in memory or from file to file."""
