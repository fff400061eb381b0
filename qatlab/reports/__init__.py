"""How stored results are shown: in the terminal, in files and in pictures. No module here imports a stage."""
