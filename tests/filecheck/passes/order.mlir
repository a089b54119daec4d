// RUN: sagec opt -p "order" --split-input-file --verify-diagnostics --parsing-diagnostics %s | filecheck %s
// RUN: sagec opt -p "order,order" --split-input-file --verify-diagnostics --parsing-diagnostics %s | filecheck %s

// The text may say things in any order; afterwards every value is made before it is used.
// CHECK-LABEL: pd.graph @backwards
// CHECK-NEXT: %new = pd.requests
// CHECK: %kv = pd.prefill %new
// CHECK-NEXT: %end = pd.decode %kv
// CHECK-NEXT: pd.yield %end
pd.graph @backwards {
  %end = pd.decode %kv : !pd.kv<1>
  %kv = pd.prefill %new : !pd.kv<1>
  %new = pd.requests ["a": prompt 9]
  pd.yield %end
}

// -----

// What needs nothing of each other stays as the text has it.
// CHECK-LABEL: pd.graph @stable
// CHECK-NEXT: %b = pd.requests
// CHECK: %a = pd.requests
// CHECK: %kb = pd.prefill %b
// CHECK-NEXT: %ka = pd.prefill %a
pd.graph @stable {
  %b = pd.requests ["b": prompt 2]
  %a = pd.requests ["a": prompt 1]
  %kb = pd.prefill %b
  %ka = pd.prefill %a
}

// -----

// A phase needs what the ops inside of it need.
// CHECK-LABEL: pd.graph @phases
// CHECK-NEXT: %new = pd.requests
// CHECK: %kv = pd.phase prefill
// CHECK-NEXT: %0 = pd.prefill %new
pd.graph @phases {
  %kv = pd.phase prefill {
    %0 = pd.prefill %new : !pd.kv<1>
    pd.yield %0
  } : !pd.kv<1>
  %new = pd.requests ["a": prompt 9]
}

// -----

// A cycle is told with its whole path and the lines.
// CHECK: order.mlir:53:3: error: cycle: %x = pd.join (line 53) -> %y = pd.preempt (line 54) -> %z = pd.decode (line 55) -> %x = pd.join (line 53)
// CHECK: a value cannot be made of itself, so one of these must use another
pd.graph @cycle {
  %x = pd.join %z : !pd.kv<1>
  %y = pd.preempt %x [] : !pd.kv<1>
  %z = pd.decode %y : !pd.kv<1>
}

// -----

// CHECK: error: cycle: %x = pd.join (line 62) -> %x = pd.join (line 62)
pd.graph @of_itself {
  %x = pd.join %x : !pd.kv<1>
}

// -----

// What is made in one phase is no business of another, unless it is yielded.
// CHECK: error: nothing here defines %0
pd.graph @escape {
  %new = pd.requests ["a": prompt 9]
  %kv = pd.phase prefill {
    %0 = pd.prefill %new
    pd.yield %0
  } : !pd.kv<1>
  %end = pd.phase decode {
    %1 = pd.decode %0 : !pd.kv<1>
    pd.yield %1
  } : !pd.kv<1>
}

// -----

// CHECK: error: request "a" comes twice into @twice (also at {{.*}}order.mlir:{{[0-9]+}}:3)
// CHECK: ids are unique in a graph
pd.graph @twice {
  %new = pd.requests ["a": prompt 9]
  %old = pd.resident on @d0 ["a": context 9]
}
