"""What `depo report` and `depo watch` show of a run: its files, the numbers, the words, the figures, the page."""
