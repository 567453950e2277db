"""The model service of one replica: clients' streams on one side, Triton on the other."""
