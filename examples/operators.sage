// A small model on two ranks: what its steps compute, operator by operator.
//
//     sagec opt -p "serve,convert-pd-to-exec{step=0}" examples/operators.sage
//     sagec opt -p "serve,convert-pd-to-exec{step=0},exec" examples/operators.sage

model pocket {
  layers 2
  hidden 512
  heads 8
  kv_heads 4
  ffn 1408
  vocab 8192
  dtype f32
  max_context 2048
}

cluster desk {
  devices c0..c1 kind cpu
  link c0 to c1 bandwidth 5GB/s latency 20us
  instance i0 role both on c0..c1 engine torch tp 2 kv_blocks 400 block 16 budget 512
}

serve on desk mode hybrid chunk 256 {
  request "a" tokens 200 generate 20
  request "b" tokens 180 generate 20
}
