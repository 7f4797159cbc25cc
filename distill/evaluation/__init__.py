"""How good a student is: metrics, the protocol that measures teacher and student alike, pictures and the report."""
