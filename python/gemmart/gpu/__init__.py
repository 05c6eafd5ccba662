"""GPUs: which drivers and devices there are (drivers), which modules (modules, probe), what is wrong (search), how a
module is built (compilers, commands, recompile) and which layers go where (plan)."""
