// Prints what a client makes of each call: one line of JSON, with pictures or with an error.

/** edit(call): gives a list of Buffers. errors: the classes that the client's documentation names. */
export async function answerEach(edit, ...errors) {
  for (const call of JSON.parse(process.argv[2])) {
    let line;
    try {
      line = { pictures: (await edit(call)).map((each) => each.toString("base64")) };
    } catch (error) {
      if (!errors.some((each) => error instanceof each)) throw error;
      line = { error: error.constructor.name, text: error.message };
    }
    console.log(JSON.stringify(line));
  }
}
