"""Linear solvers: `(H_i + Λ + damping I) x_i = b_i` for every task."""
