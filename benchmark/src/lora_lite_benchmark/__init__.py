"""Trains every lora-lite variant on question/answer data, tests it on word problems, and prints one table.

The protocol, in the order in which a run takes it: `config` (what is run), `data` (questions and answers), `train` (the
loop), `evaluate` (exact match and loss), `measure` (time and memory), `verify` (the saved file is the trained adapter),
`results` (one JSON file a run), `table` and `plot` (what a reader sees). `run` puts them together, `cli` is the command.
"""
