;; y = w x, the product of two matrices of float32: w (K, M), x (M, N), y (K, N), each row after row.
;; K is a multiple of 4, N of 8. $w, $x, $y are addresses in bytes.
;;
;; Four rows by eight columns of y at a time are summed up in eight registers of four numbers each (a0 a1 .. d0 d1).
;; A step of the sum takes eight numbers of a row of x and one of each of four rows of w, which is multiplied with all
;; eight. So each number that is loaded is used several times, and y is written once.
;;
;; Its bytes stand in kernel.js. They are what this prints (`pip install wasmtime`):
;; python -c "import wasmtime; print(wasmtime.wat2wasm(open('ex2/live/kernel.wat').read()).hex())"
(module
  (import "page" "memory" (memory 1))
  (func (export "product")
    (param $w i32) (param $x i32) (param $y i32) (param $K i32) (param $M i32) (param $N i32)
    (local $row_of_w i32) (local $row_of_y i32) (local $end_of_w i32)  ;; lengths in bytes; where a row of w ends
    (local $column i32) (local $from_w i32) (local $from_x i32) (local $to_y i32)
    (local $two_rows i32) (local $three_rows i32)
    (local $x0 v128) (local $x1 v128) (local $factor v128)
    (local $a0 v128) (local $a1 v128) (local $b0 v128) (local $b1 v128)
    (local $c0 v128) (local $c1 v128) (local $d0 v128) (local $d1 v128)

    (local.set $row_of_w (i32.mul (local.get $M) (i32.const 4)))
    (local.set $row_of_y (i32.mul (local.get $N) (i32.const 4)))
    (local.set $two_rows (i32.mul (local.get $row_of_w) (i32.const 2)))
    (local.set $three_rows (i32.mul (local.get $row_of_w) (i32.const 3)))

    (loop $four_rows
      (local.set $end_of_w (i32.add (local.get $w) (local.get $row_of_w)))
      (local.set $column (i32.const 0))
      (loop $eight_columns
        (local.set $a0 (v128.const f32x4 0 0 0 0)) (local.set $a1 (local.get $a0))
        (local.set $b0 (local.get $a0)) (local.set $b1 (local.get $a0))
        (local.set $c0 (local.get $a0)) (local.set $c1 (local.get $a0))
        (local.set $d0 (local.get $a0)) (local.set $d1 (local.get $a0))
        (local.set $from_w (local.get $w))
        (local.set $from_x (i32.add (local.get $x) (local.get $column)))

        (loop $sum
          (local.set $x0 (v128.load (local.get $from_x)))
          (local.set $x1 (v128.load offset=16 (local.get $from_x)))

          (local.set $factor (v128.load32_splat (local.get $from_w)))
          (local.set $a0 (f32x4.add (local.get $a0) (f32x4.mul (local.get $factor) (local.get $x0))))
          (local.set $a1 (f32x4.add (local.get $a1) (f32x4.mul (local.get $factor) (local.get $x1))))

          (local.set $factor (v128.load32_splat (i32.add (local.get $from_w) (local.get $row_of_w))))
          (local.set $b0 (f32x4.add (local.get $b0) (f32x4.mul (local.get $factor) (local.get $x0))))
          (local.set $b1 (f32x4.add (local.get $b1) (f32x4.mul (local.get $factor) (local.get $x1))))

          (local.set $factor (v128.load32_splat (i32.add (local.get $from_w) (local.get $two_rows))))
          (local.set $c0 (f32x4.add (local.get $c0) (f32x4.mul (local.get $factor) (local.get $x0))))
          (local.set $c1 (f32x4.add (local.get $c1) (f32x4.mul (local.get $factor) (local.get $x1))))

          (local.set $factor (v128.load32_splat (i32.add (local.get $from_w) (local.get $three_rows))))
          (local.set $d0 (f32x4.add (local.get $d0) (f32x4.mul (local.get $factor) (local.get $x0))))
          (local.set $d1 (f32x4.add (local.get $d1) (f32x4.mul (local.get $factor) (local.get $x1))))

          (local.set $from_x (i32.add (local.get $from_x) (local.get $row_of_y)))
          (local.set $from_w (i32.add (local.get $from_w) (i32.const 4)))
          (br_if $sum (i32.lt_u (local.get $from_w) (local.get $end_of_w))))

        (local.set $to_y (i32.add (local.get $y) (local.get $column)))
        (v128.store (local.get $to_y) (local.get $a0)) (v128.store offset=16 (local.get $to_y) (local.get $a1))
        (local.set $to_y (i32.add (local.get $to_y) (local.get $row_of_y)))
        (v128.store (local.get $to_y) (local.get $b0)) (v128.store offset=16 (local.get $to_y) (local.get $b1))
        (local.set $to_y (i32.add (local.get $to_y) (local.get $row_of_y)))
        (v128.store (local.get $to_y) (local.get $c0)) (v128.store offset=16 (local.get $to_y) (local.get $c1))
        (local.set $to_y (i32.add (local.get $to_y) (local.get $row_of_y)))
        (v128.store (local.get $to_y) (local.get $d0)) (v128.store offset=16 (local.get $to_y) (local.get $d1))

        (local.set $column (i32.add (local.get $column) (i32.const 32)))
        (br_if $eight_columns (i32.lt_u (local.get $column) (local.get $row_of_y))))

      (local.set $w (i32.add (local.get $w) (i32.mul (local.get $row_of_w) (i32.const 4))))
      (local.set $y (i32.add (local.get $y) (i32.mul (local.get $row_of_y) (i32.const 4))))
      (local.set $K (i32.sub (local.get $K) (i32.const 4)))
      (br_if $four_rows (local.get $K)))))
