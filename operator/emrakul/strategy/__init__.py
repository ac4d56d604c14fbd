"""How a cycle decides: requests, scores, evidence, budgets, the decision. Pure; nothing here reads or writes."""
