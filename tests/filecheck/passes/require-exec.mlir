// RUN: sagec opt -p "require-exec" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "require-exec,require-exec" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "exec" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "overlap-communication,fuse-communication,prefetch-kv,plan-memory" --split-input-file %s | filecheck %s --check-prefix=ALONE

// A module with operators is what it asks for. One graph is enough.
// CHECK-LABEL: exec.graph @operators
// CHECK: exec.yield %t
exec.graph @operators {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  exec.yield %t
}
cluster.device @g0

// -----

// Who names the pipeline `exec` on steps has left out what makes operators of them.
// CHECK: require-exec.mlir:24:1: error: require-exec: there is no exec.graph to work on
// CHECK-NEXT: pd.graph @steps
// CHECK-NEXT: convert-pd-to-exec makes them of steps: serve,convert-pd-to-exec,exec

// Each pass by itself leaves such a module as it is.
// ALONE: pd.graph @steps
pd.graph @steps {
  %asked = pd.requests ["a": prompt 10 generate 4] : !pd.wave<1>
  %kv = pd.prefill %asked : !pd.kv<1>
  pd.yield %kv : !pd.kv<1>
}

// -----

// A module without any graph, too.
// CHECK: error: require-exec: there is no exec.graph to work on
cluster.device @g0
