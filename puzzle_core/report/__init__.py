"""Reports: tables, figures and their pages. The only place where units become human. No torch."""
