/* What a PS/2 keyboard and mouse say, as bytes of the i8042; `q` powers off. */
#include "pc.h"

static void command(u8 value) { while (inb(0x64) & 2) ; outb(0x64, value); }
static void data(u8 value) { while (inb(0x64) & 2) ; outb(0x60, value); }
static u8 answer(void) { while (!(inb(0x64) & 1)) ; return inb(0x60); }

void kernel(u32 magic, u32 *multiboot) {
    (void)magic; (void)multiboot;
    com_open(COM1);
    command(0xad); command(0xa7);
    while (inb(0x64) & 1) inb(0x60);
    command(0x20); u8 configuration = answer();
    command(0x60); data((configuration | 0x40) & ~0x33); /* scan codes of set 1, no interrupts, both ports on */
    command(0xae); command(0xa8);
    command(0xd4); data(0xf4); answer(); /* the mouse reports */
    say("keys are read\n");
    for (;;) {
        u8 status = inb(0x64);
        if (!(status & 1)) continue;
        u8 byte = inb(0x60);
        say(status & 0x20 ? "mouse " : "key ");
        say_hex(byte); say("\n");
        if (!(status & 0x20) && byte == 0x90) power_off();
    }
}
