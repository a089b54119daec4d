// RUN: sagec opt %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | filecheck %s --check-prefix=GENERIC

// Columns are attributes of any op; here of a switch, which knows none of them.
// CHECK: cluster.switch @integers {all = #pd.column<0, -1, 9223372036854775807, -9223372036854775808>, none = #pd.column<>}
cluster.switch @integers {all = #pd.column<0, -1, 0x7FFFFFFFFFFFFFFF, -9223372036854775808>, none = #pd.column<>}

// Long columns print as bytes; short ones may be written so.
// CHECK-NEXT: cluster.switch @bytes {two = #pd.column<1, -1>}
cluster.switch @bytes {two = #pd.column<"0x0100000000000000ffffffffffffffff">}

// Anything but printable ASCII prints as bytes, as MLIR does it; the text may hold it as it is.
// CHECK-NEXT: cluster.switch @strings {names = #pd.names<"a", "", "\C3\A9 \E4\BD\A0", "\22\\\0A">, none = #pd.names<>}
cluster.switch @strings {names = #pd.names<"a", "", "é 你", "\"\\\n">, none = #pd.names<>}

// Few words, and a code a row.
// CHECK-NEXT: cluster.switch @words {of = #pd.words<"p0", "d\C3\A9" : 0, 1, 1>, none = #pd.words<: >}
cluster.switch @words {of = #pd.words<"p0", "dé" : 0, 1, 1>, none = #pd.words<: >}

// Lists, and their form as offsets and values.
// CHECK-NEXT: cluster.switch @lists {of = #pd.lists<[0, 64, -1], []>, none = #pd.lists<>, bytes = #pd.lists<[7], []>}
cluster.switch @lists {
  of = #pd.lists<[0, 64, -1], []>, none = #pd.lists<>,
  bytes = #pd.lists<"0x000000000000000001000000000000000100000000000000", "0x0700000000000000">
}

// Symbols and strings of scalars take any character too, also in generic form.
// CHECK-NEXT: cluster.device @"\C3\A9 1" {kind = "\E4\BD\A0"}
// GENERIC: "cluster.device"() <{sym_name = "\C3\A9 1", kind = "\E4\BD\A0"}> : () -> ()
cluster.device @"é 1" {kind = "你"}

// CHECK-NEXT: pd.graph @"\C3\A9"
pd.graph @"é" {
  // CHECK: pd.resident on @"\C3\A9 1" [
  // CHECK-NEXT: "\E4\BD\A0": context 9223372036854775807 tenant "\C3\A9"
  %r = pd.resident on @"é 1" ["你": context 9223372036854775807 tenant "é"]
}
