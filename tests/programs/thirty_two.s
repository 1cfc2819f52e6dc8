# A 32-bit program that waits: pause(2) is call 29 of that kind.
    .globl _start
_start:
    mov $29, %eax
    int $0x80
    jmp _start
