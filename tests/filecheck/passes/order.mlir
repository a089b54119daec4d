// RUN: sagec opt -p "order" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "order,order" --split-input-file --verify-diagnostics %s | filecheck %s

// What is made stands before what uses it, whatever the text says.
// CHECK-LABEL: pd.graph @upside_down
// CHECK-NEXT: %w = pd.requests
// CHECK: %kv = pd.prefill %w
// CHECK-NEXT: %old = pd.resident
// CHECK: %all = pd.join %kv, %old
// CHECK-NEXT: %end = pd.decode %all
// CHECK-NEXT: pd.yield %end
pd.graph @upside_down {
  %end = pd.decode %all : !pd.kv<2>
  %all = pd.join %kv, %old : !pd.kv<1>, !pd.kv<1>
  %kv = pd.prefill %w : !pd.kv<1>
  %old = pd.resident on @d0 ["r": context 10 remaining 4]
  %w = pd.requests ["a": prompt 5 generate 3]
  pd.yield %end : !pd.kv<2>
}

// What is in order stays as it was written: %b before %a.
// CHECK-LABEL: pd.graph @stable
// CHECK-NEXT: %b = pd.requests [
// CHECK: %a = pd.requests [
// CHECK: %kb = pd.prefill %b
// CHECK-NEXT: %ka = pd.prefill %a
pd.graph @stable {
  %b = pd.requests ["b": prompt 5]
  %a = pd.requests ["a": prompt 5]
  %kb = pd.prefill %b
  %ka = pd.prefill %a
  %all = pd.join %ka, %kb
  pd.yield %all
}

// Each phase is sorted, and the phases by what their ops use.
// CHECK-LABEL: pd.graph @phases
// CHECK: %kv = pd.phase prefill
// CHECK-NEXT: pd.prefill %w
// CHECK: %end = pd.phase decode
// CHECK-NEXT: %all = pd.join %kv
// CHECK-NEXT: %last = pd.decode %all
// CHECK-NEXT: pd.yield %last
pd.graph @phases {
  %end = pd.phase decode {
    %last = pd.decode %all : !pd.kv<1>
    %all = pd.join %kv : !pd.kv<1>
    pd.yield %last : !pd.kv<1>
  } : !pd.kv<1>
  %kv = pd.phase prefill {
    %0 = pd.prefill %w : !pd.kv<1>
    pd.yield %0 : !pd.kv<1>
  } : !pd.kv<1>
  %w = pd.requests ["a": prompt 5]
  pd.yield %end : !pd.kv<1>
}

// An empty graph is in order.
// CHECK-LABEL: pd.graph @empty
// CHECK-NEXT: pd.yield
pd.graph @empty {}

// -----

// A cycle is reported with its whole path, and the line of each value on it.
// CHECK: order.mlir:[[A:[0-9]+]]:3: error: cycle: %a = pd.preempt (line [[A]]) -> %b = pd.join (line [[B:[0-9]+]]) -> %c = pd.decode (line [[C:[0-9]+]]) -> %a = pd.preempt (line [[A]])
// CHECK-NEXT: | {{ *}}%a = pd.preempt %c [] : !pd.kv<1>
// CHECK: a value cannot be made of itself, so one of these must use another

pd.graph @cycle {
  %a = pd.preempt %c [] : !pd.kv<1>
  %b = pd.join %a : !pd.kv<1>
  %c = pd.decode %b : !pd.kv<1>
  %outside = pd.resident on @d0 ["r": context 10]
  pd.yield %outside
}

// -----

// A value that is made of itself at once.
// CHECK: error: cycle: %a = pd.decode (line {{[0-9]+}}) -> %a = pd.decode (line {{[0-9]+}})

pd.graph @self {
  %a = pd.decode %a : !pd.kv<1>
  pd.yield %a : !pd.kv<1>
}

// -----

// A cycle through a phase: what the phase gives is made of what it uses.
// CHECK: error: cycle: %p = pd.phase (line {{[0-9]+}}) -> %d = pd.decode (line {{[0-9]+}}) -> %p = pd.phase (line {{[0-9]+}})

pd.graph @through_a_phase {
  %p = pd.phase decode {
    %0 = pd.join %d : !pd.kv<1>
    pd.yield %0 : !pd.kv<1>
  } : !pd.kv<1>
  %d = pd.decode %p : !pd.kv<1>
  pd.yield %d : !pd.kv<1>
}

// -----

// What is made in a phase is seen outside only when the phase yields it.
// CHECK: error: pd.decode uses %inside, which is made inside a phase
// CHECK: yield it from there

"pd.graph"() <{sym_name = "escape"}> ({
  %w = pd.requests ["a": prompt 5]
  %end = pd.decode %inside : !pd.kv<1>
  %kv = pd.phase prefill {
    %inside = pd.prefill %w
    pd.yield %inside : !pd.kv<1>
  } : !pd.kv<1>
  pd.yield %end
}) : () -> ()

// -----

// Ids are unique in a graph, over all that brings requests.
// CHECK: error: request "a" comes twice into @twice (also at {{.*}}order.mlir:{{[0-9]+}}:3)
// CHECK-NEXT: | {{ *}}%old = pd.resident
// CHECK-NEXT: ids are unique in a graph

pd.graph @twice {
  %w = pd.requests ["a": prompt 5]
  %old = pd.resident on @d0 ["b": context 3, "a": context 10]
  pd.yield %old
}

// -----

// Two graphs may name the same.
// CHECK-LABEL: pd.graph @one
// CHECK: "a": prompt 5
// CHECK-LABEL: pd.graph @two
// CHECK: "a": prompt 6
pd.graph @one {
  %w = pd.requests ["a": prompt 5]
}
pd.graph @two {
  %w = pd.requests ["a": prompt 6]
}
