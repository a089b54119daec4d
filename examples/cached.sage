// Three questions about one text: it is computed once, and found in the prefix cache by the others.

model tiny from "models/tiny"

cluster desk {
  device cpu kind cpu
  instance i0 role both on cpu engine torch model tiny kv_blocks 40 block 16
      options "eviction=s3-fifo host_blocks=64"
}

serve on desk with fifo chunk 64 horizon 8 {
  request "first"
      prompt "A baker had a red door, and a sailor had a blue one. The smith lived between them, and the weaver across the street. Every morning the baker gave the smith a loaf, and the smith gave the baker a nail.\nQuestion: Who had a red door?\nAnswer:"
      generate 12
  request "second"
      prompt "A baker had a red door, and a sailor had a blue one. The smith lived between them, and the weaver across the street. Every morning the baker gave the smith a loaf, and the smith gave the baker a nail.\nQuestion: Who had a blue door?\nAnswer:"
      generate 12 arrives 200ms
  request "third"
      prompt "A baker had a red door, and a sailor had a blue one. The smith lived between them, and the weaver across the street. Every morning the baker gave the smith a loaf, and the smith gave the baker a nail.\nQuestion: Who lived between them?\nAnswer:"
      generate 12 arrives 300ms
}
