"""What other projects need to work with moe_fx, one module for each."""
