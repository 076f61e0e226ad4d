"""Models whose tokenizers differ: whose tokens the result has, and which rows of which model they are."""
