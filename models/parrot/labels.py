"""What one of the two says in a frame, as a number: of dialogues whose words are known."""

NOT_SPEAKING, PAUSING, FIRST_WORD = 0, 1, 2
"""Outside all turns, inside a pause of one, and the first of the words."""
UNKNOWN = -1
"""Speech whose words have no times."""
