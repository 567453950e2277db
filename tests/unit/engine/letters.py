"""A vocabulary of letters, for grammars over a tiny model."""

# Token 0 is said by nobody, 1 begins and 2 ends a text; the others are the letters that GPT-2's vocabulary has.
LETTERS = ["<|pad|>", "<|begin|>", "<|end|>", "\u0120", *(chr(code) for code in range(34, 126))]
BYTES = [b"", b"", b"", b" ", *(bytes([code]) for code in range(34, 126))]
