"""What is kept of a graph: programs, saved graphs, ExportedPrograms of others."""
