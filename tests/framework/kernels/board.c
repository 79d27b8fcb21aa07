/* What a board has beside its devices: processors, memory, ports that say something, and three ways to end a boot. */
#include "pc.h"

static void debug_say(u16 port, const char *text) { while (*text) outb(port, *text++); }

static void describe(u32 *multiboot) {
    u32 a, b, c, d;
    outw(0x510, 5); /* fw_cfg: how many processors */
    u32 cpus = inb(0x511) | inb(0x511) << 8;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1), "c"(0));
    say("cpus "); say_number(cpus);
    say(c >> 30 & 1 ? " rdrand" : " no-rdrand");
    say(" upper "); say_number(multiboot[2]);
    say(" year "); say_hex(cmos(9)); say("\n");
    u32 *module = (u32 *)multiboot[6]; /* start, end, string, reserved */
    for (u32 i = 0; i < multiboot[5]; i++, module += 4) {
        say("module "); say((char *)module[2]); say(": ");
        for (char *at = (char *)module[0]; at < (char *)module[1]; at++) com_put(COM1, *at);
        say("\n");
    }
    debug_say(0xe9, "on 0xe9\n");
    debug_say(0x402, "on 0x402\n");
    com_open(COM2);
    com_say(COM2, "on COM2: q ends this boot\n");
    while (com_get(COM2) != 'q') ;
}

void kernel(u32 magic, u32 *multiboot) {
    (void)magic;
    u8 boot = cmos(0x70);
    com_open(COM1);
    say("boot "); say_number(boot); say("\n");
    set_cmos(0x70, boot + 1);
    switch (boot) {
    case 0: describe(multiboot); reset();
    case 1: triple_fault();
    case 2: outl(0xf4, 0x10);
    }
    set_cmos(0x70, 0);
    power_off();
}
