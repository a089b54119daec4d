// RUN: not sagec opt -p "order" -t "plan{form=text}" %s 2>&1 | filecheck %s

// A plan is made of steps, which the graph does not have before fuse-steps.
// CHECK: unscheduled.mlir:6:1: error: pd.graph @unscheduled has no pd.steps
// CHECK: run fuse-steps first
pd.graph @unscheduled {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
}
