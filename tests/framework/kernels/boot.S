/* A 32-bit multiboot kernel (Multiboot 0.6.96, 3.1): a stack, then kernel(magic, information). */
        .set FLAGS, 3                   /* modules on pages, memory information */
        .section .multiboot, "a"
        .long 0x1BADB002, FLAGS, -(0x1BADB002 + FLAGS)
        .text
        .globl _start
_start: mov $stack, %esp
        push %ebx
        push %eax
        call kernel
1:      cli
        hlt
        jmp 1b
        .bss
        .align 16
        .skip 65536
stack:
        .section .note.GNU-stack, "", @progbits
