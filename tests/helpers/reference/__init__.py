"""Independent references that the tests compare against. Nothing here imports hf_pdecay."""
