"""How tests compile: what they compute takes milliseconds, so that compiling it is nearly all of their time."""

from importlib.metadata import version

#: LLVM without its optimisations, on one piece (on 32, tests side by side take a sixth longer); and up to jaxlib 0.10, which has that
#: choice, no MLIR for fusions. A training step of a test compiles in 4 s instead of 21 then.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
