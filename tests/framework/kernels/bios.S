/* A disk that boots by BIOS: its first sector loads the 24 sectors from LBA 8 on and starts what is in them. */
        .code16
        .text
        .globl _start
_start: ljmp $0, $1f
1:      xor %ax, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x7c00, %sp
        mov $packet, %si
        mov $0x42, %ah
        int $0x13
        jnc 2f
        /* A floppy has no extended reads: cylinder 0, head 0, sectors 9 to 18, then head 1. */
        mov $0x020a, %ax
        mov $0x0009, %cx
        mov $0, %dh
        mov $0x8000, %bx
        int $0x13
        mov $0x020e, %ax
        mov $0x0001, %cx
        mov $1, %dh
        mov $0x9400, %bx
        int $0x13
2:      ljmp $0, $0x8000
packet: .byte 16, 0, 24, 0
        .word 0x8000, 0
        .quad 8
        .org 510
        .word 0xaa55
