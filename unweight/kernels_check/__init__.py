"""A command that compiles every GPU kernel and reads the disassembly."""
